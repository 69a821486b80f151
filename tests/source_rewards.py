"""Rewards of two data sources with columns of their own; small, since each worker imports them."""


def one_right(completion: str, answer: str) -> float:
    return float(completion == answer)


def two_right(completion: str, right: str) -> float:
    return float(completion == right)
