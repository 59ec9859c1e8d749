"""Reads that are asked for while another is on its way to Redis become one read.

A busy API otherwise holds a connection for each request, and pays Redis' client for each. Knows no
HTTP; works for any reader whose answers do not depend on who is asked beside whom.
"""

import asyncio

from afterclick.serving.errors import AfterclickError, UnavailableError
from afterclick.serving.lookup import USERS_MAX, Top
from afterclick.serving.reader import AsyncTopK

IN_FLIGHT_MAX = 2
"""Reads on their way at a time: while Redis answers one, the next is already sent. A third would
only make both smaller.
"""

_Asked = tuple[str, "asyncio.Future[Top]"]


class GatheredTopK:
    """`AsyncTopK.get`, gathered; for one event loop.

    A read that fails for one user's list alone is repeated for each, so that nobody gets another
    user's error.
    """

    def __init__(self, reader: AsyncTopK) -> None:
        self._reader = reader
        self._asked: dict[int | None, list[_Asked]] = {}
        self._carriers: set[asyncio.Task[None]] = set()

    async def get(self, user_id: str, k: int | None = None) -> Top:
        """The user's list; the fallback list for a user without one."""
        future: asyncio.Future[Top] = asyncio.get_running_loop().create_future()
        self._asked.setdefault(k, []).append((user_id, future))
        if len(self._carriers) < IN_FLIGHT_MAX:
            carrier = asyncio.create_task(self._carry())
            self._carriers.add(carrier)
            carrier.add_done_callback(self._carriers.discard)
        return await future

    async def _carry(self) -> None:
        while self._asked:
            k = next(iter(self._asked))
            asked = self._asked.pop(k)
            if len(asked) > USERS_MAX:
                self._asked[k] = asked[USERS_MAX:]
                asked = asked[:USERS_MAX]
            await self._answer(asked, k)

    async def _answer(self, asked: list[_Asked], k: int | None) -> None:
        try:
            tops = await self._reader.get_many([user_id for user_id, _ in asked], k)
        except Exception as error:  # noqa: BLE001 - whoever asked must hear of it
            alone = len(asked) == 1 or not isinstance(error, AfterclickError)
            if not alone and not isinstance(error, UnavailableError):
                for one in asked:
                    await self._answer([one], k)
                return
            for _, future in asked:
                if not future.done():  # a client that left has cancelled it
                    future.set_exception(error)
            return
        for (_, future), top in zip(asked, tops, strict=True):
            if not future.done():
                future.set_result(top)
