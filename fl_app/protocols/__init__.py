"""Round protocols: how a cohort's updates reach the aggregator."""
