-- What an administrator asks of a user of another tenant is answered as fast as of one that there is not: nothing of theirs is looked at.
DROP INDEX auth.audit_of_user;
CREATE INDEX audit_of_user ON auth.audit (tenant_id, user_id, position DESC);
