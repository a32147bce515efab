"""The status page: one JSON document of what a run's ledger says, and one small page that shows it."""
