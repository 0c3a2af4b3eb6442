"""Continual learning: methods that learn a sequence of tasks, and what each leaves of the earlier ones."""
