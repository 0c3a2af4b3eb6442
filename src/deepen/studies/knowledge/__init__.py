"""`deepen study knowledge`: the same tuning on the base and on the expanded, trained model (paper, Figure 7)."""
