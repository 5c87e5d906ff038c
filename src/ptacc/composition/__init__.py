"""How a class statement becomes a trainer: option fields and checks of the class body."""
