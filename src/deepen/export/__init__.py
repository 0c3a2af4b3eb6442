"""A finished model for elsewhere: one GGUF file for llama.cpp, a repository on the hub, a server's command.

`gguf` writes the file and needs the package of that name, an extra; `hub` pushes; `serving` checks. Nothing
here changes a model: what arrives is what was trained, tensor by tensor.
"""
