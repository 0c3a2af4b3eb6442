"""`deepen study knowledge`: one tuning on the base and on the expanded, trained model (paper, Figure 7)."""
