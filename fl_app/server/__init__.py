"""The server of a federation: rounds, cohorts, evaluation and the server optimizer; no engine."""
