"""Cache methods: cache layers of transformers that hold keys and values in fewer bytes. See `base` for the socket."""
