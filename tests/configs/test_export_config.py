"""Options of what leaves for others."""

from __future__ import annotations

import pytest

from modeling_llm2clip.configs.export_config import CardConfig, ExportConfig


def test_another_license_needs_its_name_and_address() -> None:
    with pytest.raises(ValueError, match="license=other needs license_name and license_link"):
        CardConfig(license="other", license_name="Mine")
    CardConfig(license="other", license_name="Mine", license_link="https://example.org")


@pytest.mark.parametrize("license", ["Apache 2.0", "", "MIT!"])
def test_a_license_is_an_identifier_of_the_hub(license: str) -> None:
    with pytest.raises(ValueError, match=r"must be an identifier of the Hub, like apache-2\.0"):
        CardConfig(license=license)


@pytest.mark.parametrize("size", ["5", "0GB", "5 GB", "-1MB"])
def test_a_size_of_files_has_a_unit(size: str) -> None:
    with pytest.raises(ValueError, match="must be a size, like 5GB or 500MB"):
        ExportConfig(max_shard_size=size)


@pytest.mark.parametrize("license", [None, "apache-2.0"])
@pytest.mark.parametrize("field", ["license_name", "license_link"])
def test_name_and_address_are_those_of_a_license_that_is_given(
    license: str | None, field: str
) -> None:
    """On a card of another license a name would stand beside that one's address."""
    with pytest.raises(ValueError, match="license_name and license_link need license=other"):
        CardConfig(license=license, **{field: "https://example.org"})
