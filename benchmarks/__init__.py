"""How fast it is, beside its ceilings and rivals; README.md says what each number means."""
