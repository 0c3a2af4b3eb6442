"""The whole life on an embedded tiny base: offline, on a CPU, in about two minutes."""
