"""Serving: a release and a user's past in, a ranked list out. Knows no Kafka."""
