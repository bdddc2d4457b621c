"""Which linear gets how many bits: sensitivities, errors on a ladder of levels, and the choice under a budget."""
