"""What runs beside the SuperLink: the Flower ``ServerApp``, the ledger, evaluation and export."""
