"""What a training must pass: the gate before it, signs of ill health while it runs, the export after it."""
