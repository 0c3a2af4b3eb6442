"""One loop on plain torch: optimiser, schedule, atomic checkpoints, exact resume, the metrics log."""
