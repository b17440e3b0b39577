"""The verdict, from connections straight to the server: what is lost, torn, or should not be there."""

from collections import Counter
from collections.abc import Iterable

from attrs import Factory, define, frozen

from campaign.promise import ROUTES, Answer, Transaction
from campaign.server import Server
from campaign.tables import ACCOUNTS, BALANCE
from tests.support.databases import Judge


@frozen
class Finding:
    """One thing that must not be."""

    kind: str
    """Lost, phantom, torn, or what else is wrong."""
    text: str
    number: int = 0

    def __str__(self) -> str:
        """Return it as the report shows it."""
        return f"{self.kind}: {self.text}"


@define(eq=False)
class Rows:
    """What is in the two databases."""

    parts: dict[tuple[str, int], set[str]] = Factory(dict[tuple[str, int], set[str]])
    """By database and number."""
    balances: dict[int, int] = Factory(dict[int, int])
    transfers: list[tuple[int, int, int, int]] = Factory(list[tuple[int, int, int, int]])
    """Number, source, target, amount."""

    def present(self, number: int, transaction: Transaction) -> frozenset[str]:
        """Return the parts of a transaction that are there."""
        return transaction.parts & self.parts.get((transaction.database, number), set[str]())


async def read(server: Server) -> Rows:
    """Read everything."""
    rows = Rows()
    for database, url in server.urls.items():
        async with Judge(url) as judge:
            for number, part in await judge.rows("SELECT number, part FROM entry"):
                rows.parts.setdefault((database, int(str(number))), set()).add(str(part))
            if database == "main":
                balances = await judge.rows("SELECT id, balance FROM account")
                rows.balances = {int(str(id_)): int(str(balance)) for id_, balance in balances}
                moved = await judge.rows("SELECT number, source, target, amount FROM transfer")
                for values in moved:
                    number, source, target, amount = (int(str(value)) for value in values)
                    rows.transfers.append((number, source, target, amount))
    return rows


def judge(answers: Iterable[Answer], rows: Rows) -> list[Finding]:
    """Compare what clients were told with what is there."""
    findings = list[Finding]()
    known = dict[tuple[str, int], set[str]]()
    for answer in answers:
        findings += _judge(answer, rows)
        for transaction in ROUTES[answer.route].transactions:
            known.setdefault((transaction.database, answer.number), set()).update(transaction.parts)
    for (database, number), parts in rows.parts.items():
        strange = parts - known.get((database, number), set())
        if strange:
            findings.append(
                Finding("phantom", f"{number} in {database}: {sorted(strange)} nobody wrote", number)
            )
    return findings + _judge_accounts(rows)


def _judge(answer: Answer, rows: Rows) -> list[Finding]:
    findings = list[Finding]()
    whole = set[str]()
    for transaction in ROUTES[answer.route].transactions:
        present, due = rows.present(answer.number, transaction), answer.due(transaction)
        wrong = ""
        if present == transaction.parts:
            whole.add(transaction.name)
            if (transaction.after and transaction.after not in whole) or transaction.instead_of in whole:
                wrong = "torn"
            elif due == "absent":
                wrong = "phantom"
        elif due == "there":
            wrong = "lost"
        elif present:
            wrong = "phantom" if due == "absent" else "torn"
        if wrong:
            text = (
                f"{answer.number} {answer.route}, {answer.seen} by {answer.status or 'nothing'}, "
                f"done {sorted(answer.done)}, doubt {sorted(answer.doubt)}: {transaction.name} was to be "
                f"{due}, and of {sorted(transaction.parts)} there is {sorted(present)}. {answer.error}"
            )
            findings.append(Finding(wrong, text, answer.number))
    return findings


def _judge_accounts(rows: Rows) -> list[Finding]:
    findings = list[Finding]()
    expected = Counter(dict.fromkeys(range(ACCOUNTS), BALANCE))
    for number, source, target, amount in rows.transfers:
        expected[source] -= amount
        expected[target] += amount
        if "a" not in rows.parts.get(("main", number), ()):
            findings.append(Finding("torn", f"{number}: a transfer without its row", number))
    if sum(rows.balances.values()) != ACCOUNTS * BALANCE:
        findings.append(Finding("sum", f"the sum over the accounts is {sum(rows.balances.values())}"))
    if rows.balances != dict(expected):
        findings.append(
            Finding("balance", f"{rows.balances} are not what the transfers make, {dict(expected)}")
        )
    return findings
