"""Base → expand → train → evaluate → report: the only place where training meets evaluation."""
