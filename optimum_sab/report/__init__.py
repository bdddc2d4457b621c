"""What is told of a binarized model: report.json, and the page made of it. Knows no model, only what is in the file."""
