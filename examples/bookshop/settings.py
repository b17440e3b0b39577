"""What the environment tells the service: read once at startup, and wrong values all reported together."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from attrs import NOTHING, Attribute, field, fields, frozen
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

PREFIX = "BOOKSHOP_"


class SettingsError(Exception):
    """The environment is not complete, or has values that make no sense; the text has a line for each."""


def postgresql(text: str) -> URL:
    """Read the URL of a database; the password is not in its repr()."""
    if not text.startswith("postgresql+asyncpg://"):
        message = "it must begin with postgresql+asyncpg://"
        raise ValueError(message)
    try:
        return make_url(text)
    except (ValueError, ArgumentError):
        message = "it cannot be read"  # SQLAlchemy's own text repeats it, with the password
        raise ValueError(message) from None


def redis(text: str) -> str:
    """Read the URL of a Redis."""
    if not text.startswith(("redis://", "rediss://")):
        message = "it must begin with redis:// or rediss://"
        raise ValueError(message)
    return text


def positive(text: str) -> int:
    """Read a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        message = "it must be a whole number above 0"
        raise ValueError(message)
    return int(text)


def secret(text: str) -> str:
    """Read a secret that is long enough to be one."""
    if len(text) < 16:
        message = "it must have at least 16 characters"
        raise ValueError(message)
    return text


def switch(text: str) -> bool:
    """Read what is on or off."""
    if text not in {"on", "off"}:
        message = "it must be on or off"
        raise ValueError(message)
    return text == "on"


def from_text(read: Callable[[str], object], example: str) -> dict[str, Any]:
    """Describe a setting: how its text is read, and an example for the error."""
    return {"read": read, "example": example}


@frozen(kw_only=True)
class Settings:
    """The settings; each is read from the variable of its name, as BOOKSHOP_SHOP_URL."""

    shop_url: URL = field(metadata=from_text(postgresql, "postgresql+asyncpg://app:secret@localhost/shop"))
    reporting_url: URL = field(
        metadata=from_text(postgresql, "postgresql+asyncpg://app:secret@localhost/reporting")
    )
    redis_url: str = field(repr=False, metadata=from_text(redis, "redis://localhost:6379/0"))
    mail_folder: Path = field(metadata=from_text(Path, "/var/spool/bookshop"))
    replica_url: URL | None = field(default=None, metadata=from_text(postgresql, "that of a standby"))
    pool_size: int = field(default=10, metadata=from_text(positive, "10"))
    sweep_seconds: int = field(default=5, metadata=from_text(positive, "5"))
    telemetry: bool = field(default=False, metadata=from_text(switch, "on"))
    admin_https: bool = field(default=True, metadata=from_text(switch, "on"))
    admin_password: str | None = field(default=None, repr=False, metadata=from_text(secret, "a secret"))
    admin_secret: str | None = field(default=None, repr=False, metadata=from_text(secret, "another one"))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read all settings, or raise SettingsError with all that is wrong."""
        wrong: list[str] = []
        values: dict[str, Any] = {}
        known: dict[str, Attribute[Any]] = {PREFIX + one.name.upper(): one for one in fields(cls)}
        for name, attribute in known.items():
            if name in environment:
                try:
                    values[attribute.name] = attribute.metadata["read"](environment[name])
                except ValueError as error:
                    wrong.append(f"{name} cannot be used: {error}")
            elif attribute.default is NOTHING:
                wrong.append(f"{name} is missing: set it, for example to {attribute.metadata['example']}")
        wrong += [
            f"{name} is not known: remove it, or correct its name"
            for name in sorted(environment)
            if name.startswith(PREFIX) and name not in known
        ]
        if (f"{PREFIX}ADMIN_PASSWORD" in environment) != (f"{PREFIX}ADMIN_SECRET" in environment):
            wrong.append(f"{PREFIX}ADMIN_PASSWORD and {PREFIX}ADMIN_SECRET go together: set both, or none")
        if wrong:
            raise SettingsError("\n".join(wrong))
        return cls(**values)
