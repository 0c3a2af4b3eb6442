"""What runs in the sandboxed processes: standard library only, imported without `deepen` itself."""
