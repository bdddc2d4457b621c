"""What the model is shown: every accepted form of data, read, or written by the model, and encoded."""
