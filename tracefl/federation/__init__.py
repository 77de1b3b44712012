"""The federated run: Flower apps, the recorder around any strategy, and the simulation."""
