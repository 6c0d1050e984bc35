"""Shared parts of the methods: their base, the loop over stage pairs, sums of methods, statistics over a batch."""
