"""Different ways to compute the loss, a module each (protocol.py); `select.get` has them by name."""
