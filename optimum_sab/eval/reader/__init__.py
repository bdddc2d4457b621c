"""A small vision-language model around a real language model: it reads drawn words and names CIFAR-10's pictures."""
