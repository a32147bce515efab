"""Federated averaging of tensors: FedAvg of all parameters, FedIT of adapters, FedZO after zeroth-order steps."""
