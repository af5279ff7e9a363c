"""Asynchronous federated learning (FedBuff): nobody waits for the slowest; late updates count less."""
