"""Images: how fast loaders bring them, and that their views are alike."""
