"""A solution of exercise 20, LoRA."""


def lora(x, weight, A, B, alpha):
    return x @ weight.T + alpha / len(A) * (x @ A.T) @ B.T


def lora_gradient(grad, x, weight, A, B, alpha):
    scaled = alpha / len(A) * grad
    return grad @ weight + scaled @ B @ A, (scaled @ B).T @ x, scaled.T @ (x @ A.T)
