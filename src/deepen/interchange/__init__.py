"""Other projects' files in: what arrives leaves as an ordinary Hugging Face directory.

A llama2.c file (`import_llama2c`) and its tokenizer. No torch, no transformers.
"""

from deepen.interchange.llama2c import ImportResult, import_llama2c

__all__ = ["ImportResult", "import_llama2c"]
