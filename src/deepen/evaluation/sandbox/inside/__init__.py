"""What runs in the sandboxed processes: standard library and ctypes only, imported without `deepen` itself."""
