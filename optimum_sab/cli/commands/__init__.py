"""What the commands do: a module each, with `run(options)`, imported when it is called."""
