"""The service's settings, read from environment variables at startup; all errors are reported together."""

import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, PositiveInt, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

PREFIX = "BOOKSHOP_"


class SettingsError(Exception):
    """The environment is incomplete, or has invalid values or names; the text has a line for each."""


def postgresql(url: str | URL) -> URL:
    """Parse a database URL; its repr() hides the password."""
    try:
        url = make_url(url)
    except ArgumentError:
        message = "it is not a URL"  # SQLAlchemy's own text repeats it, with the password
        raise ValueError(message) from None
    if url.drivername != "postgresql+asyncpg":
        message = "it must begin with postgresql+asyncpg://"
        raise ValueError(message)
    return url


DatabaseUrl = Annotated[URL, BeforeValidator(postgresql)]
RedisUrl = Annotated[str, Field(repr=False, pattern="^rediss?://")]
Secret = Annotated[SecretStr, Field(min_length=16)]


class Settings(BaseSettings):
    """The settings; each is read from an environment variable such as BOOKSHOP_SHOP_URL."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        arbitrary_types_allowed=True,
        enable_decoding=False,  # URL is a tuple type, whose values would be parsed as JSON
        hide_input_in_errors=True,
    )

    shop_url: DatabaseUrl
    reporting_url: DatabaseUrl
    redis_url: RedisUrl
    mail_folder: Path
    replica_url: DatabaseUrl | None = None
    pool_size: PositiveInt = 10
    sweep_seconds: PositiveInt = 5
    telemetry: bool = False
    admin_password: Secret | None = None
    admin_secret: Secret | None = None
    admin_https: bool = True

    @model_validator(mode="after")
    def admin_is_complete(self) -> Self:
        """Refuse a password without the secret that signs the cookies, and the reverse."""
        if (self.admin_password is None) != (self.admin_secret is None):
            message = "set both of admin_password and admin_secret, or neither"
            raise ValueError(message)
        return self

    @classmethod
    def from_environment(cls) -> Self:
        """Read all settings, or raise SettingsError with all problems."""
        lines = [*cls.unknown_variables()]
        try:
            settings = cls.model_validate({})
        except ValidationError as error:
            lines += [
                f"{PREFIX}{'_'.join(map(str, one['loc'])).upper() or '*'}: {one['msg']}"
                for one in error.errors(include_url=False, include_input=False, include_context=False)
            ]
            raise SettingsError("\n".join(lines)) from None
        if lines:
            raise SettingsError("\n".join(lines))
        return settings

    @classmethod
    def unknown_variables(cls) -> Iterator[str]:
        """Complain of variables that are no settings; pydantic-settings would ignore a misspelt one."""
        known = {field.upper() for field in cls.model_fields}
        for name in sorted(os.environ):
            prefix, field = name[: len(PREFIX)].upper(), name[len(PREFIX) :].upper()
            if prefix == PREFIX and field not in known:
                close = [f"; did you mean {PREFIX}{one}?" for one in get_close_matches(field, known, n=1)]
                yield f"{name}: there is no such setting{''.join(close)}"
