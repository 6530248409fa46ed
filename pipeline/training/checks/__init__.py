"""What a training must pass: the gate before it, signs that something is wrong while it runs, the export after it."""
