"""What a model says next: its output embedding, the temperature of its predictions, and how far two models agree."""
