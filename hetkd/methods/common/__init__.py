"""What methods share: their base, the loop over stage pairs, sums of methods, statistics over a batch."""
