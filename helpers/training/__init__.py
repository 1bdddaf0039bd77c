"""Train a Keras network on a Spark DataFrame, in one process or on several workers.

Both trainers have the API of Distributed Keras: construct one with a network and the training
options; `train(df)` returns a trained copy of the network. `SingleTrainer` trains on the driver.
`AveragingTrainer` trains in rounds of ordinary Spark jobs: each task trains the network on its part
of the rows, and the driver averages the weights, from which the next round starts.

`recipe` has the network, loss and optimizer in the form that is sent to tasks, `task` trains on one
part of the rows, and `trainers` runs the rounds and averages.
"""

from helpers.training.trainers import AveragingTrainer, SingleTrainer, Trainer, TrainingError
