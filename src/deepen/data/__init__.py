"""Texts in: documents, tokenised corpora, the training mixture and evaluation windows."""
