"""Whether the models that a config names are there: seconds instead of the many retries that loading one makes."""

import time
from http import HTTPStatus
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
)

from vlscale.models.towers import check_exists, one_line

FILES = ("config.json", "tokenizer_config.json")  # of a model, and of what may be a tokenizer alone
TRIES, PAUSE, LIMIT = 3, 1.0, 15.0  # attempts to reach the hub, seconds between them, seconds after which none is made
_UNREACHED = {"ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"}  # of any HTTP library
_UNKNOWN = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND}


def check_source(key: str, source: str) -> None:
    """Raises ValueError unless `source`, given as `key`, is a folder or a model that the cache or the hub has. A hub
    that is reached but slow, or in trouble, decides nothing here: loading waits for it."""
    if Path(source).is_file():
        raise ValueError(
            f"{key}={source} is a file; expected the folder of a model, with config.json and model.safetensors. A "
            "checkpoint of open_clip becomes one by `vlscale import open-clip`"
        )
    check_exists(source)
    if Path(source).is_dir():
        return
    expected = f"{key}={source}: expected a folder or the name of a model on the hub; no folder of that name is here"
    try:
        if any(try_to_load_from_cache(source, file) is not None for file in FILES):
            return
        _ask(source)
    except HFValidationError:
        raise ValueError(f"{expected}, and models have names such as facebook/dinov2-base; correct the path") from None
    except OfflineModeIsEnabled:
        raise ValueError(
            f"{expected}, it was never downloaded to {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; correct the "
            f"name, or `hf download {source}` where there is a network"
        ) from None
    except GatedRepoError:
        raise ValueError(
            f"{key}={source}: the hub gives it to those who accepted its terms; accept them at "
            f"{constants.ENDPOINT}/{source}, and `hf auth login`"
        ) from None
    except EntryNotFoundError:
        return  # it is there, whatever it holds
    except HfHubHTTPError as error:
        if error.response.status_code in _UNKNOWN:
            raise ValueError(
                f"{expected}, and {constants.ENDPOINT} knows none; correct the name, or `hf auth login` for one that "
                "is not public"
            ) from None
    except Exception as error:
        if not _unreached(error):
            return
        raise ValueError(
            f"{expected}, it was never downloaded to {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be "
            f"reached ({one_line(error)}); correct the name, or `hf download {source}` where there is a network"
        ) from None


def _ask(source: str) -> None:
    """For its config; names that are not resolved at once, and connections that are refused, are tried again."""
    started = time.monotonic()
    for left in reversed(range(TRIES)):
        try:
            get_hf_file_metadata(hf_hub_url(source, FILES[0]), timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return
        except OfflineModeIsEnabled:
            raise
        except Exception as error:
            if not _unreached(error) or not left or time.monotonic() - started > LIMIT:
                raise
        time.sleep(PAUSE)


def _unreached(error: Exception) -> bool:
    return any(kind.__name__ in _UNREACHED for kind in type(error).__mro__)
