"""An object that lives in one executor: its calls happen in order, and it remembers.

python examples/sessions/actor/actor.py
"""

import asyncio

import flame.sessions
from flame.errors import TaskFailed


class Account:
    """An account. Nothing in it is locked, as one call at a time is all there is."""

    def __init__(self, owner: str, balance: int = 0) -> None:
        self.owner = owner
        self.balance = balance
        self.entries: list[int] = []

    def book(self, amount: int) -> int:
        """Pay in, or out; gives the balance."""
        if self.balance + amount < 0:
            raise ValueError(f"{self.owner} has only {self.balance}")
        self.balance += amount
        self.entries.append(amount)
        return self.balance

    def statement(self) -> dict[str, object]:
        """All that was booked."""
        return {"owner": self.owner, "balance": self.balance, "entries": self.entries}


async def main() -> None:
    async with flame.sessions.actor(Account, "Ada", balance=100) as account:
        calls = [account.book(amount) for amount in (50, -30, 5)]  # under way together, done one after the other
        print("balances:", [await call for call in calls])
        try:
            await account.book(-1000)
        except TaskFailed as error:
            print(f"refused: {error.reason}")
        print("statement:", await account.statement())


if __name__ == "__main__":
    asyncio.run(main())
