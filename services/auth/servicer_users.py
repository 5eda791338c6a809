"""The part of AuthService about users: proto in, domain call, proto out."""

from __future__ import annotations

from typing import Any

from chassis import audit, identity
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from services.auth import callers, messages, resets, users


class UsersServicer(auth_pb2_grpc.AuthServiceServicer):
    """Users, as administrators of their tenant see them."""

    _users: users.Users
    _resets: resets.Resets

    async def CreateUser(self, request: auth_pb2.CreateUserRequest, context: Any) -> auth_pb2.CreateUserResponse:
        admin = callers.present()
        user = users.wanted(request.email, request.password, request.roles, request.tier)
        self._users.require_reach(admin, user.roles, user.tier)
        user_id, reset_token = await self._users.create(user, admin.tenant_id, audit.actor(identity.current()), admin.user_id)
        return auth_pb2.CreateUserResponse(user_id=user_id, reset_token=reset_token)

    async def ResolveUser(self, request: auth_pb2.ResolveUserRequest, context: Any) -> auth_pb2.ResolveUserResponse:
        return auth_pb2.ResolveUserResponse(user_id=await self._users.resolve(request.tenant_id, request.user_id, request.email))

    async def GetUser(self, request: auth_pb2.GetUserRequest, context: Any) -> auth_pb2.GetUserResponse:
        return auth_pb2.GetUserResponse(user=messages.user(await self._users.get(identity.current().user, request.user_id)))

    async def ListUsers(self, request: auth_pb2.ListUsersRequest, context: Any) -> auth_pb2.ListUsersResponse:
        found, token = await self._users.page(
            identity.current().user, request.page_size, request.page_token, request.email_contains
        )  # fmt: skip
        return auth_pb2.ListUsersResponse(users=[messages.user(each) for each in found], next_page_token=token)

    async def UpdateUser(self, request: auth_pb2.UpdateUserRequest, context: Any) -> auth_pb2.UpdateUserResponse:
        changed = await self._users.change(callers.present(), request.user_id, request.roles, request.tier)
        return auth_pb2.UpdateUserResponse(user=messages.user(changed))

    async def DisableUser(self, request: auth_pb2.DisableUserRequest, context: Any) -> auth_pb2.DisableUserResponse:
        disabled = await self._users.disable(callers.present(), request.user_id, request.reason)
        return auth_pb2.DisableUserResponse(user=messages.user(disabled))

    async def EnableUser(self, request: auth_pb2.EnableUserRequest, context: Any) -> auth_pb2.EnableUserResponse:
        enabled = await self._users.enable(callers.present(), request.user_id)
        return auth_pb2.EnableUserResponse(user=messages.user(enabled))

    async def CreateResetToken(self, request: auth_pb2.CreateResetTokenRequest, context: Any) -> auth_pb2.CreateResetTokenResponse:
        admin = callers.present()
        await self._users.within_reach(admin, request.user_id)
        token, ends_at = await self._resets.token(admin, request.user_id)
        return auth_pb2.CreateResetTokenResponse(reset_token=token, expires_at=messages.stamp(ends_at))
