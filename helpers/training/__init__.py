"""Training of a Keras network on a Spark DataFrame, by one process or by several workers.

Both trainers have the call forms of Distributed Keras: made with a network and what training needs,
and `train(df)` returns a trained copy of the network. `SingleTrainer` trains on the driver.
`AveragingTrainer` trains in rounds of ordinary Spark jobs: each task trains the network on its part
of the rows, and the driver averages the weights, from which the next round starts.
"""

from helpers.training.trainers import AveragingTrainer, SingleTrainer, TrainingError
