"""What the estimates rest on: published runs, the constants fitted to them, and how far the estimates are off."""
