"""Weight methods: linear layers in, cheaper layers out. See `base` for the socket."""
