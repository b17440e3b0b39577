-- Print the userlist.txt of PgBouncer, which needs the same SCRAM secrets as PostgreSQL.
SELECT format('"%s" "%s"', rolname, rolpassword) FROM pg_authid WHERE rolname = 'app';
