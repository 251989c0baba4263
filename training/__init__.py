"""The nano checkpoint: the world that it is trained in and the stages that train it."""
