"""What every runtime shares: experiment, zoo, data, local training. Knows neither Horovod nor
Flower.
"""
