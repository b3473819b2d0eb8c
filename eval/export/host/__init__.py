"""An exported model's host: text to image in NumPy and a phone's runtime, as an app would do it. Never imports PyTorch."""
