"""Token reduction: one method, one file (`foveate methods`). See `base` for the socket."""
