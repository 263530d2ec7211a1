"""What a text does in a base model: second moments of the layers' inputs, gradients of its loss.

For every target layer, with x (in,) the layer's input at one token::

    second_moment = mean over tokens that are not padding of x x^T        (in, in), float64

This is not centred; CorDA's code calls it a covariance. Everything is summed in float64: in lower
precision the smallest eigenvalues, which are all that LoRA-Null uses, are rounding errors. On the
text to keep it says where the knowledge lies, on the new task's text where the task does; the same
`collect` makes both, and `collect_gradients` says where the task wants to go::

    gradient = d(mean loss of the learned tokens) / dW                    (out, in)
"""
